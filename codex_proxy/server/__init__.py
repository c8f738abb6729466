"""The caller's side: HTTP requests in, answers out."""
