"""Many stages in a row: what the demo runs, from the corpus (`corpus`) to the report."""
