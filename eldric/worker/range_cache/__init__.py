"""What a worker without a mount has of models: byte ranges that were fetched from data workers, in sparse files."""
