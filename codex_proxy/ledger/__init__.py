"""Users, client keys and money: who may ask for what, what it has cost, and that it adds up."""
