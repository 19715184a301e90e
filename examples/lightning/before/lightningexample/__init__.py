"""lightningexample: a Flower app with PyTorch Lightning."""
