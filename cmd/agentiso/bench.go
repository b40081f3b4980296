package main

import "github.com/spf13/cobra"

// newBench gathers the benchmarks. Each is a command of its own that starts
// and stops what it needs.
func (a *app) newBench() *cobra.Command {
	return group("bench", "Measure this build on this host", a.benchCommands()...)
}
