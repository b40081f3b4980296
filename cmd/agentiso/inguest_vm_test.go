//go:build vm

package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentiso/agentiso/client"
)

// TestGuestPackagesInGuest runs the agent's own tests where the agent lives:
// in a guest, as root, with a cgroup v2, capabilities that hosts in containers
// lack, and vsock over its loopback. Hosts that cannot run them skip them.
func TestGuestPackagesInGuest(t *testing.T) {
	h := newTestHost(t, "")
	c := h.start("")
	if _, _, err := c.Create(t.Context(), client.CreateOptions{Name: "guest", Image: "dev", MemoryMiB: 1024}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		pkg, tags, run string
		env            map[string]string
	}{
		{"../../internal/guest/proc", "host", "ForkBomb|DescriptorLimit", nil},
		{"../../internal/guest/identity", "host", "GrowToDevice|Freeze|Configure", nil},
	} {
		t.Run(filepath.Base(tt.pkg), func(t *testing.T) {
			bin := filepath.Join(t.TempDir(), "test")
			build := exec.Command("go", "test", "-c", "-tags", tt.tags, "-o", bin, tt.pkg)
			build.Env = append(build.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("build: %v\n%s", err, out)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			if _, err := c.CopyTo(ctx, "guest", bin, "/root/test", client.CopyOptions{User: "root"}); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			code, err := c.Exec(ctx, "guest", []string{"/root/test", "-test.v", "-test.run", tt.run},
				client.ExecOptions{Stdout: &out, Stderr: &out, User: "root", Workdir: "/root", Env: tt.env})
			if err != nil || code != 0 {
				t.Fatalf("code %d, %v\n%s", code, err, out.String())
			}
			if !strings.Contains(out.String(), "--- PASS") || strings.Contains(out.String(), "missing capability") {
				t.Errorf("not everything ran:\n%s", out.String())
			}
		})
	}
}
