"""Models of other projects: what they are called there, and here."""
