"""What a run will take: time, nodes, cost."""
