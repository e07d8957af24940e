"""The list of all images of a data set, made once and kept with the run."""
