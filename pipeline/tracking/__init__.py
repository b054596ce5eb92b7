"""Records of runs, and the MLflow store that shows them."""
