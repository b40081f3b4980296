package boot

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// loadModules loads what list names, in its order, from dir. No list is a
// kernel with everything built in. A module that does not load is reported and
// passed over: whether the machine can live without it shows a moment later, by
// a clearer name than the module's.
func loadModules(dir, list string, link Link, log *slog.Logger) error {
	text, err := os.ReadFile(list)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read module list: %w", err)
	}
	for _, name := range parseModuleList(string(text)) {
		if !needed(name, link) {
			continue
		}
		if err := loadModule(filepath.Join(dir, name)); err != nil {
			log.Warn("load module", "name", name, "err", err)
		}
	}
	return nil
}

// needed spares a boot the modules of the link that is not in use. The serial
// port's are always loaded: it is what vsock falls back to.
func needed(name string, link Link) bool {
	return link == Vsock || !strings.Contains(name, "vsock")
}

// parseModuleList reads one file name per line; anything with a slash is not
// one of ours and is dropped.
func parseModuleList(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		name := strings.TrimSpace(line)
		if name != "" && !strings.HasPrefix(name, "#") && !strings.Contains(name, "/") {
			names = append(names, name)
		}
	}
	return names
}

func loadModule(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.FinitModule(fd, "", 0)
	// Built in, or loaded by the kernel's own request for it.
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
