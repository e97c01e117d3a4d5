"""What is to be computed: the spec of a layer, who holds which slice of which expert, formats and weights."""
