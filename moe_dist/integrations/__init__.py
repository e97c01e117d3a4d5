"""moe_dist's layers inside of models and servers of others. Nothing here is imported unless it is asked for."""
