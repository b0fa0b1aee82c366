"""What a user asks for, one verb a file: storage and tables, no Ray."""
