"""Rewrites: each is a torch.fx pass over a GraphModule."""
