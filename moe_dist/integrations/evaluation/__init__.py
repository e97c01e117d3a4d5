"""How well a whole model answers with moe_dist's layers in it, and a tiny model to try that on. docs/accuracy.md says
how it is run. transformers is imported by what needs it, when it is called."""
