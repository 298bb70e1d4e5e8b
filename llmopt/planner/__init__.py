"""What fits where: memory, speed by the roofline and cost of a model on a table of hardware, from config.json alone."""
