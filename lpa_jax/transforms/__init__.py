"""The perturbations: one file a method; a name with an underscore is what several share."""
