"""The images of a data set: their list, their bytes and their order."""
