// Command agentiso gives AI agents Linux machines of their own: the command
// line, and with `agentiso serve` the daemon behind it.
//
// It parses, wires and prints. Everything about workspaces is asked of the
// daemon through package client, the same way as any other program would.
package main

import (
	"context"
	"os"
)

// version is set by the build.
var version = "dev"

func main() { os.Exit(execute(context.Background(), os.Args[1:])) }
