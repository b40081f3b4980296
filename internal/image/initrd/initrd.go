// Package initrd makes the initial RAM disks that machines boot from: the guest
// agent as /init, the kernel modules that it loads before it can reach its disk
// and its link, and next to nothing else.
//
// The archive is a plain newc cpio, not compressed: unpacking costs an emulated
// guest more than QEMU saves by reading less. CPU time of QEMU until the agent
// is ready, TCG, lean kernel, 10.6 MB archive, medians of 8: plain 1.02 s, lz4
// (4.8 MB) 1.05 s, gzip (4.1 MB) 1.15 s. It is a pure function of its contents,
// so a [Cache] keeps each by the digest of what went into it.
//
// What the agent does with it is package guest/boot's business; which modules a
// kernel needs is package image/kernel's. The agent knows the paths below by
// agreement: a change here is a change of formatVersion and of guest/boot.
package initrd

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// formatVersion is part of every cache key; raise it when the layout changes.
const formatVersion = 1

// Paths inside the archive, relative to its root.
const (
	agentPath   = "init"
	modulesDir  = "modules"
	modulesList = "modules/list"
	newRootDir  = "newroot"
)

// Module is one kernel module, ready to be loaded.
type Module struct {
	Name   string // as in modinfo, such as "virtio_blk"
	Path   string // of the uncompressed .ko on the host
	Digest string // of its content, for the cache key
}

// Contents is what goes into an initrd besides its fixed skeleton.
type Contents struct {
	Agent   string   // path of the static agent binary
	Modules []Module // in the order in which they must be loaded
}

// Write writes the archive of c to w.
//
// /dev/console is there because the kernel opens it for /init's standard
// streams before anything is mounted; /dev/null because the Go runtime opens it
// in their place on a machine that has no console, and aborts without it.
// /shutdown is how systemd hands the machine back to its initrd at the end
// (SYSTEMD.IO/INITRD_INTERFACE), having moved /run and the others there; it is
// the agent too.
func Write(w io.Writer, c Contents) error {
	bw := bufio.NewWriterSize(w, 256<<10)
	cw := NewWriter(bw)
	for _, d := range []string{"dev", "proc", "sys", "run", newRootDir, modulesDir} {
		if err := cw.Dir(d, 0o755); err != nil {
			return err
		}
	}
	if err := cw.CharDevice("dev/console", 0o600, 5, 1); err != nil {
		return err
	}
	if err := cw.CharDevice("dev/null", 0o666, 1, 3); err != nil {
		return err
	}
	if err := addFile(cw, agentPath, 0o755, c.Agent); err != nil {
		return err
	}
	if err := cw.Symlink("shutdown", agentPath); err != nil {
		return err
	}
	var list strings.Builder
	for _, m := range c.Modules {
		name := m.Name + ".ko"
		if err := addFile(cw, modulesDir+"/"+name, 0o644, m.Path); err != nil {
			return err
		}
		list.WriteString(name + "\n")
	}
	if err := cw.File(modulesList, 0o644, int64(list.Len()), strings.NewReader(list.String())); err != nil {
		return err
	}
	if err := cw.Close(); err != nil {
		return err
	}
	return bw.Flush()
}

func addFile(cw *Writer, name string, perm uint32, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("add %s: %s is not a regular file", name, path)
	}
	return cw.File(name, perm, st.Size(), f)
}
