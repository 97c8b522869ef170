"""Several ranks that train together: the one room that knows torch.distributed."""
