"""The hub: registry, certificates, rounds, secure sum, releases, rollouts, `fleet` CLI and dashboard."""
