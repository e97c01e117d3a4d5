"""Cases to rows: what is measured, how it is checked, how it is written down."""
