"""One page, or Markdown, or CSV, from results files: `moe-dist report`."""
