"""`recurrent-depth prepare`: from text to packed rows."""
