// Command agentiso gives AI agents Linux machines of their own: the command
// line, and with `agentiso serve` the daemon behind it.
//
// It parses, wires and prints. Everything about workspaces is asked of the
// daemon through package client, the same way as any other program would.
package main

import (
	"context"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// version is set by the build.
var version = "dev"

func main() {
	keepInherited()
	os.Exit(execute(context.Background(), os.Args[1:]))
}

// keepInherited keeps what our parent left open, such as a script's lock, from
// the daemon and from machines, which would hold it for as long as they live.
func keepInherited() {
	const first = 3 // after the standard streams
	// Before Linux 5.11 it fails, and they are passed on.
	_ = unix.CloseRange(first, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
}
