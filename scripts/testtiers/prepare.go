package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// prepareVM makes what the vm tier's tests share, with the product's own
// commands: kernels and images, kept by digest in a cache directory, so that a
// second run makes nothing.
func prepareVM() error {
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	run, err := os.MkdirTemp("", "agentiso-test-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(run)
	config := filepath.Join(run, "config.toml")
	text := fmt.Sprintf("[server]\ndata_dir = %q\nrun_dir = %q\n", cache, run)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	agentiso := func(args ...string) error {
		cmd := exec.CommandContext(context.Background(), "bin/agentiso", append([]string{"--config", config}, args...)...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("agentiso %v: %w", args, err)
		}
		return nil
	}
	if err := agentiso("up"); err != nil {
		return err
	}
	defer agentiso("down") //nolint:errcheck // the daemon holds nothing but the cache
	for _, args := range [][]string{
		{"kernel", "fetch"},
		{"kernel", "build"},
		{"image", "build", "minimal"},
		{"image", "build", "dev"},
		{"image", "build", "systemd"},
	} {
		if err := agentiso(args...); err != nil {
			return err
		}
	}
	lean, err := os.ReadFile(filepath.Join(cache, "kernels", "names", "lean"))
	if err != nil {
		return err
	}
	vmlinux := filepath.Join(cache, "kernels", "kernels", strings.TrimSpace(string(lean)), "vmlinux")
	return errors.Join(os.Setenv("AGENTISO_TEST_DATA", cache), os.Setenv("AGENTISO_TEST_KERNEL", vmlinux))
}

// cacheDir is below the user's cache directory; root's is closed to the users
// that machines run as.
func cacheDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/cache/agentiso-test", nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "agentiso-test"), err
}
