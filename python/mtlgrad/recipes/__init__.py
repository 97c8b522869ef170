"""Complete trainings on the data that ships with the package; ``mtlgrad train`` runs them."""
