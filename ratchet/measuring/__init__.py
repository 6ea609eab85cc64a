"""Cases, and how they are measured in fresh processes of any build."""
