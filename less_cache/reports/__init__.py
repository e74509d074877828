"""What a measurement says: the machine, a line of JSON, a plot."""
