"""The stateless relay: requests for a far server go through as they are. It knows no account and no dialect."""
