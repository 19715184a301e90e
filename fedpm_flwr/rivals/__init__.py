"""The methods that FedPM is compared with: each file one, with its update, its source, and what was inferred."""
