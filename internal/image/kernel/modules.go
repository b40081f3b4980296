package kernel

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Modules that a machine needs before its agent can be reached, in the order in
// which the agent wants them: bus, disk, link, network. What they depend on is
// found out. Without a required one there is no machine; without the others one
// that lacks something, such as vsock on kernels that never had it.
var wantedModules = []struct {
	name     string
	required bool
}{
	{"virtio_mmio", true},
	{"virtio_blk", true},
	{"ext4", true},
	{"virtio_console", true},
	{"virtio_net", true},
	{"vmw_vsock_virtio_transport", false},
}

// maxModule bounds one decompressed module. The largest in Debian's cloud kernel
// is 4 MiB.
const maxModule = 64 << 20

// module is a kernel module as it lies in a package.
type module struct {
	name string // as the kernel says it: with underscores
	file string // below the modules directory; "" for a built-in
}

// moduleTree is one kernel's /lib/modules/RELEASE.
type moduleTree struct {
	dir     string
	modules map[string]module
}

// openModuleTree lists the modules below dir, loadable and built in. The package
// as it was built has no modules.dep: depmod writes that when it is installed,
// from the same modinfo that order reads.
func openModuleTree(dir string) (*moduleTree, error) {
	t := &moduleTree{dir: dir, modules: map[string]module{}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, ok := moduleName(d.Name())
		if !ok {
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		t.modules[name] = module{name, rel}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	f, err := os.Open(filepath.Join(dir, "modules.builtin"))
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list built-in modules: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if name, ok := moduleName(filepath.Base(sc.Text())); ok {
			t.modules[name] = module{name: name}
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("list built-in modules: %w", err)
	}
	return t, nil
}

// moduleName takes the name from a file's: virtio-rng.ko.xz is virtio_rng.
func moduleName(file string) (string, bool) {
	base, _, ok := strings.Cut(file, ".ko")
	if !ok || base == "" {
		return "", false
	}
	return strings.ReplaceAll(base, "-", "_"), true
}

// loadable is a module that has to be loaded, in its uncompressed bytes.
type loadable struct {
	name string
	data []byte
}

// order returns wanted modules and all that they depend on, each after what it
// needs and once. Built-in ones are left out. missing names those wanted that
// the tree does not have.
func (t *moduleTree) order(wanted []string) (out []loadable, missing []string, err error) {
	const (
		inProgress = 1
		done       = 2
	)
	state := map[string]int{}
	var visit func(name string, path []string) error
	visit = func(name string, path []string) error {
		path = append(path, name)
		switch state[name] {
		case done:
			return nil
		case inProgress:
			return fmt.Errorf("modules depend on one another in a circle: %s", strings.Join(path, " → "))
		}
		state[name] = inProgress
		m, ok := t.modules[name]
		if !ok {
			return fmt.Errorf("module %s is needed by %s and not there", name, path[max(0, len(path)-2)])
		}
		if m.file != "" {
			data, err := readModule(filepath.Join(t.dir, m.file))
			if err != nil {
				return fmt.Errorf("read module %s: %w", name, err)
			}
			deps, err := moduleDepends(data)
			if err != nil {
				return fmt.Errorf("read module %s: %w", name, err)
			}
			for _, d := range deps {
				if err := visit(d, path); err != nil {
					return err
				}
			}
			out = append(out, loadable{name, data})
		}
		state[name] = done
		return nil
	}
	for _, name := range wanted {
		if _, ok := t.modules[name]; !ok {
			missing = append(missing, name)
			continue
		}
		if err := visit(name, nil); err != nil {
			return nil, nil, err
		}
	}
	return out, missing, nil
}

// readModule reads a module and decompresses it by its file name, so that the
// guest need not.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = bufio.NewReader(f)
	switch filepath.Ext(path) {
	case ".ko":
	case ".gz":
		if r, err = gzip.NewReader(r); err != nil {
			return nil, err
		}
	case ".xz":
		if r, err = xz.NewReader(r); err != nil {
			return nil, err
		}
	case ".zst":
		zr, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxModule*2))
		if err != nil {
			return nil, err
		}
		defer zr.Close()
		r = zr
	default:
		return nil, fmt.Errorf("%s: unknown compression", filepath.Base(path))
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("larger than %d bytes", maxModule)
	}
	return data, nil
}

// moduleDepends reads the depends= entry of a module's .modinfo section: the
// names that modpost found it to take symbols from.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return nil, errors.New("no .modinfo section")
	}
	info, err := sec.Data()
	if err != nil {
		return nil, err
	}
	var deps []string
	for _, kv := range bytes.Split(info, []byte{0}) {
		v, ok := strings.CutPrefix(string(kv), "depends=")
		if !ok {
			continue
		}
		for _, name := range strings.Split(v, ",") {
			if name != "" {
				deps = append(deps, strings.ReplaceAll(name, "-", "_"))
			}
		}
	}
	return slices.Compact(deps), nil
}
