"""The resources of a run and the state of its cluster: nodes, costs, actor pool, channel to the driver."""
