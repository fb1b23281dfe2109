"""Look at latent reasoning: trajectories of the state, convergence, predictions per iteration, studies, one page."""
