"""Who is who on the network: certificates, how they are made, and when they end."""
