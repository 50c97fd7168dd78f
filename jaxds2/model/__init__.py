"""The recogniser: a convolutional front end, minGRU layers and a CTC head."""
