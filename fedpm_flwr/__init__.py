"""fedpm-flwr: second-order federated learning for Flower (FedPM, arXiv 2511.09100)."""

__version__ = "0.1.0"
