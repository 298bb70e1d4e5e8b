"""What a bench leaves to be read, by people and by other tools."""
