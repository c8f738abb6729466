"""The page at /ui: sessions, what it asks for, and the files that it is made of."""
