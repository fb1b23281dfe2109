"""Dense models become recurrent (`recurrent-depth convert`), and released retrofitted models are read and written."""
