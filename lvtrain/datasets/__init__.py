"""Making datasets: importing, generating, aligning, verifying, cleaning and choosing subsets."""
