"""`limoe plan`: the cost of a train step on a pod that is not there, from the real compiler."""
