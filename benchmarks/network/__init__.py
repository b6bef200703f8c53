"""`./dev bench models`: the network and its proof, on real images and phantoms. Peers are measured in the same run."""
