"""`limoe plan`: what a compiled train step costs on a pod that is not there."""
