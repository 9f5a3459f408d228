"""Multi-latent attention: keys and values of all heads come from one small vector of each token."""
