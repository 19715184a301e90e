"""pytorchexample: a Flower app with PyTorch."""
