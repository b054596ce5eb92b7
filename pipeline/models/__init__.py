"""timm classifiers, their weights and checkpoints."""
