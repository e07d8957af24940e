"""What a run asks of a cluster, and what there is of it: resources, nodes, actors, the channel to the driver."""
