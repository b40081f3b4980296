package client_test

import (
	"context"
	"fmt"
	"os"

	"github.com/agentiso/agentiso/client"
)

// A machine for one command, gone when the program is.
func Example() {
	ctx := context.Background()
	c, err := client.New(client.Options{Socket: "/run/agentiso/agentiso.sock"})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	ws, err := c.Hold(ctx, client.CreateOptions{Image: "dev", MemoryMiB: 1024})
	if err != nil {
		panic(err) // an *client.Error: what failed, why, and what to do next
	}
	defer ws.Release(ctx)
	if _, err := c.CopyTo(ctx, ws.ID, "analysis.py", "/tmp/", client.CopyOptions{}); err != nil {
		panic(err)
	}
	exit, err := c.Exec(ctx, ws.ID, []string{"python3", "/tmp/analysis.py"}, client.ExecOptions{
		Stdout: os.Stdout, Stderr: os.Stderr,
	})
	fmt.Println(exit, err)
}
