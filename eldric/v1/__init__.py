"""Messages and services, generated from protos/eldric/v1 by `make protos`. Do not edit."""
