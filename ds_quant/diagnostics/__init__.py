"""Looking into a quantized run: what each analysis of arXiv 2407.11722 measures, on a checkpoint or while training."""
