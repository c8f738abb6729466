"""What became of each request: kept in memory for those who look on, and in a database for those who ask later."""
